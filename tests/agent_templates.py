"""Chat templates of models that think, with the behaviour of well-known ones, in our own words."""

from __future__ import annotations

from tests.tool_templates import GENERATION_PROMPT, HERMES_RESULTS, HERMES_TOOLS

QWEN3 = HERMES_TOOLS + """
{%- set asked = namespace(last=messages | length - 1, found=false) %}
{%- for m in messages | reverse %}
  {%- if not asked.found and m.role == 'user' and not m.content.startswith('<tool_response>') %}
    {%- set asked.found = true %}{% set asked.last = messages | length - 1 - loop.index0 %}
  {%- endif %}
{%- endfor %}
{%- for m in messages %}
  {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
  {%- elif m.role == 'assistant' %}
    {%- set content = m.content %}{% set thought = '' %}
    {%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
    {%- elif '</think>' in content %}
      {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
      {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\n' }}
    {%- if loop.index0 > asked.last and (loop.last or thought) %}
      {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
    {%- else %}{{ content }}{% endif %}
    {%- for call in m.tool_calls or [] %}
      {{- ('\n' if content or not loop.first else '') + '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
      {{- (call.function.arguments | tojson) + '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
""" + HERMES_RESULTS + GENERATION_PROMPT + """
{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}
  {{- '<think>\n\n</think>\n\n' }}
{%- endif %}
"""
"""As Qwen3's: thoughts are written behind the last question only, and the last answer has some, if only empty ones."""

DEEPSEEK_R1 = """
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}
{%- for m in messages %}
  {%- if m.role == 'user' %}{{ '<|User|>' + m.content }}
  {%- elif m.role == 'assistant' %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|eos|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}
"""
"""As DeepSeek-R1's: the prompt opens a thought, and answers are written without theirs."""

QWQ = QWEN3.replace("asked.last and (loop.last or thought)", "messages | length").replace(
    "{{ '<|im_start|>assistant\n' }}{% endif %}", "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}")
"""As QwQ's: the prompt opens a thought, answers are written without theirs, and tools can be called."""

QWEN3_THINKING = QWEN3.replace(
    "{{ '<|im_start|>assistant\n' }}{% endif %}", "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}")
"""As that of Qwen3's newer models that always think: the prompt opens a thought, and the last answer is written with it."""
