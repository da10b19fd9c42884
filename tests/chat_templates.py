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
