"""Chat templates with the behaviour of well-known ones, in our own words."""

from __future__ import annotations

REWRITING = """
{%- if messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}
{%- set last = namespace(question=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
  {%- if m.role == 'assistant' %}
    {%- set parts = m.content.split('</think>') %}
    {%- set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}
    {%- set answer = parts[-1].lstrip('\n') if parts | length > 1 else m.content %}
    {{- '<|im_start|>assistant\n' }}
    {%- if loop.index0 > last.question and (loop.last or thought) %}
      {{- '<think>\n' + thought + '\n</think>\n\n' }}
    {%- endif %}
    {{- answer + '<|im_end|>\n' }}
  {%- elif m.role == 'user' or not loop.first %}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
"""As Qwen3's: thinking is taken out of earlier answers, and the last one always has a thinking part, if only an empty one."""

ALTERNATING = """
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}
  {{- '<|im_start|>' + m.role + '\n' + (m.content | trim) + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
"""As Gemma's: no system messages, turns that alternate, contents trimmed."""

DATED = """
{%- set today = date_string if date_string is defined else strftime_now('%d %b %Y') %}
{{- '<|im_start|>system\nToday: ' + today + '<|im_end|>\n' }}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
"""As Llama 3.2's: writes today's date."""

DEVELOPER = """
{%- for m in messages %}
  {%- if m.role == 'developer' %}{{ '<|im_start|>rules\n' + m.content + '<|im_end|>\n' }}
  {%- elif m.role in ('user', 'assistant') %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
  {%- else %}{{ raise_exception('unknown role ' + m.role) }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
"""A developer role of its own, and no system role."""

THINKING = """
{%- macro said(role, text) %}{{ '<|im_start|>' + role + '\n' + text + '<|im_end|>\n' }}{% endmacro %}
{%- if tools %}
  {{- '<|im_start|>system\nTools:\n<tools>\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}
  {{- '</tools>\nCall one as <tool_call>{...}</tool_call>.<|im_end|>\n' }}
{%- endif %}
{%- set last = namespace(question=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.question = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
  {%- if m.role == 'assistant' %}
    {%- set thought, answer = m.reasoning_content or '', m.content or '' %}
    {%- if not thought and '</think>' in answer %}
      {%- set thought = answer.split('</think>')[0].split('<think>')[-1].strip('\n') %}
      {%- set answer = answer.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\n' }}
    {%- if loop.index0 > last.question %}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}
    {{- answer }}
    {%- for call in m.tool_calls or [] %}
      {{- '\n<tool_call>\n' }}{{ call.function | tojson }}{{ '\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
  {%- elif m.role == 'tool' %}{{ said('user', '<tool_response>\n' + m.content + '\n</tool_response>') }}
  {%- else %}{{ said(m.role, m.content) }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\n' }}{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}
"""
"""As Qwen3's: tools, calls and results in marks; thoughts of earlier answers left out, and none if enable_thinking is false."""
THINKING_MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Its marks that aren't special tokens."""

ALWAYS_THINKING = """
{%- for m in messages %}
  {%- if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}
  {%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}
"""
"""As DeepSeek-R1's: the generation prompt begins the thoughts."""

INSTRUCT = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set rules, messages = messages[0].content + '\n\n', messages[1:] %}
{%- else %}{% set rules = '' %}{% endif %}
{%- for m in messages %}
  {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('After the optional system message, roles must alternate user/assistant') }}
  {%- endif %}
  {%- if m.role == 'user' %}{{ '[INST] ' + (rules if loop.last else '') + m.content + ' [/INST]' }}
  {%- else %}{{ ' ' + m.content + eos_token }}
  {%- endif %}
{%- endfor %}
"""
"""As Mistral's: it writes BOS and EOS, roles alternate, the system message goes into the last question."""
