"""Chat templates that render tools as those of well-known families do, in our own words; calls and results among turns."""

from __future__ import annotations

HERMES_TOOLS = """
{%- if tools %}
  {{- '<|im_start|>system\n' + (messages[0].content + '\n\n' if messages[0].role == 'system' else '') + '# Tools\n<tools>' }}
  {%- for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}
  {{- '\n</tools>\nAnswer <tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}
"""
GENERATION_PROMPT = "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"

HERMES_RESULTS = """
  {%- elif m.role == 'tool' %}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
    {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
  {%- endif %}
{%- endfor %}
"""
"""Results of tools as one turn of the user, and the end of a loop over messages `m`."""

HERMES = HERMES_TOOLS + """
{%- for m in messages %}
  {%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) or (m.role == 'system' and not loop.first) %}
    {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
  {%- elif m.role == 'assistant' %}
    {{- '<|im_start|>assistant' }}{% if m.content %}{{ '\n' + m.content }}{% endif %}
    {%- for call in m.tool_calls %}
      {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
      {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
      {{- '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
""" + HERMES_RESULTS + GENERATION_PROMPT
"""As Qwen2.5's and Qwen3's."""

SMOLLM3 = HERMES_TOOLS + """
{%- for m in messages %}
  {%- if m.role in ('user', 'assistant', 'tool') %}
    {{- '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\n' + m.content + '<|im_end|>\n' }}
  {%- endif %}
{%- endfor %}
""" + GENERATION_PROMPT
"""As SmolLM3's: tells of tools, and doesn't render calls; a result is a user's turn."""

SMOLLM3_XML_TOOLS = SMOLLM3.replace("(tool | tojson)", "(tool | string)").replace("tools %}", "xml_tools %}")
"""As SmolLM3's before that: it reads tools from another variable, functions alone."""

QWEN3_XML = """
{%- if tools %}
  {{- '<|im_start|>system\n# Tools\n<tools>' }}
  {%- for tool in tools %}
    {{- '\n<function>\n<name>' + tool.function.name + '</name>\n<description>' + tool.function.description }}
    {{- '</description>\n<parameters>' + (tool.function.parameters | tojson) + '</parameters>\n</function>' }}
  {%- endfor %}
  {{- '\n</tools>\n<tool_call>\n<function=name>\n<parameter=key>\nvalue\n</parameter>\n</function>\n</tool_call><|im_end|>\n' }}
{%- endif %}
{%- for m in messages %}
  {%- if m.role == 'assistant' and m.tool_calls %}
    {{- '<|im_start|>assistant' }}{% if m.content %}{{ '\n' + (m.content | trim) + '\n' }}{% endif %}
    {%- for call in m.tool_calls %}
      {{- '\n<tool_call>\n<function=' + call.function.name + '>\n' }}
      {%- for key, value in call.function.arguments | items %}
        {{- '<parameter=' + key + '>\n' }}
        {{- value | tojson if value is mapping or (value is sequence and value is not string) else value | string }}
        {{- '\n</parameter>\n' }}
      {%- endfor %}
      {{- '</function>\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
  {%- elif m.role == 'tool' %}
    {{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response>\n<|im_end|>\n' }}
  {%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}
""" + GENERATION_PROMPT
"""As Qwen3-Coder's."""

LLAMA3 = """
{%- set rest = messages %}
{%- if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{%- if tools is not none %}{{ 'Environment: ipython\n' }}{% endif %}
{{- (messages[0].content | trim if messages[0].role == 'system' else '') + '<|eot_id|>' }}
{%- for m in rest %}
  {%- if 'tool_calls' in m %}
    {%- if m.tool_calls | length != 1 %}{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' }}
    {{- m.tool_calls[0].function.arguments | tojson }}{{ '}<|eot_id|>' }}
  {%- elif m.role == 'tool' %}
    {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + ({'output': m.content} | tojson) + '<|eot_id|>' }}
  {%- else %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
    {%- if loop.first and tools is not none %}
      {{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.\n\n' }}
      {%- for tool in tools %}{{ (tool | tojson(indent=4)) + '\n\n' }}{% endfor %}
    {%- endif %}
    {{- (m.content | trim) + '<|eot_id|>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""
"""As Llama 3.2's: tools in the first user's turn, one call at most."""

MISTRAL = """
{%- set rest = messages %}
{%- if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% endif %}
{%- set asked = rest | selectattr('role', 'equalto', 'user') | list %}
{%- for m in rest %}
  {%- if m.role == 'user' %}
    {%- if tools is not none and m == asked[-1] %}
      {{- '[AVAILABLE_TOOLS] [' }}
      {%- for tool in tools %}{{ (tool | tojson) + (']' if loop.last else ', ') }}{% endfor %}
      {{- '[/AVAILABLE_TOOLS]' }}
    {%- endif %}
    {{- '[INST] ' + (messages[0].content + '\n\n' if loop.last and messages[0].role == 'system' else '') }}
    {{- m.content + '[/INST]' }}
  {%- elif m.tool_calls is defined %}
    {{- '[TOOL_CALLS] [' }}
    {%- for call in m.tool_calls %}
      {%- if call.id is not defined or call.id | length != 9 %}
        {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
      {%- endif %}
      {{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + (']' + eos_token if loop.last else ', ') }}
    {%- endfor %}
  {%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}
  {%- elif m.role == 'tool' %}
    {%- if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}
      {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
    {%- endif %}
    {{- '[TOOL_RESULTS] {"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
  {%- endif %}
{%- endfor %}
"""
"""As Mistral 7B's, version 0.3: calls as a list, ids of nine letters and digits."""

MISTRAL_V11 = """
{%- if tools %}{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- for m in messages %}
  {%- if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}
  {%- elif m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}
  {%- elif m.role == 'assistant' %}
    {{- m.content }}
    {%- for call in m.tool_calls or [] %}
      {{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + (call.function.arguments | tojson) }}
    {%- endfor %}
    {{- eos_token }}
  {%- else %}{{ '[TOOL_RESULTS]' + m.tool_call_id + '[TOOL_CONTENT]' + m.content + '[/TOOL_RESULTS]' }}{% endif %}
{%- endfor %}
"""
"""As Ministral's and Mistral Small 3.2's: a marker for each call, and one between its name and its arguments."""

GRANITE = """
{%- if tools %}
  {{- '<|start_of_role|>system<|end_of_role|>To call, write <|tool_call|> and a list of calls.<|end_of_text|>\n' }}
  {{- '<|start_of_role|>available_tools<|end_of_role|>' + (tools | tojson(indent=4)) + '<|end_of_text|>\n' }}
{%- endif %}
{%- for m in messages %}
  {{- '<|start_of_role|>' + m.role + '<|end_of_role|>' }}
  {%- if m.tool_calls %}
    {{- '<|tool_call|>[' }}
    {%- for call in m.tool_calls %}{{ (call.function | tojson) + (']' if loop.last else ', ') }}{% endfor %}
  {%- else %}{{ m.content }}{% endif %}
  {{- '<|end_of_text|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}
"""
"""As Granite 3.3's."""

GRANITE_TEXT_ONLY = GRANITE.replace("{%- if m.tool_calls %}", "{%- if false %}")
"""As Granite 3.3's truly is: tells of tools, and doesn't render calls."""

LIKE_GLM = HERMES.replace(
    """'\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}""",
    """'\n<tool_call>' + call.function.name + ' ' }}""",
).replace("'}\n</tool_call>'", "'</tool_call>'")
"""As GLM's: the same markers around calls as Hermes', and other text within."""

REFUSING_RESULTS = HERMES.replace("{%- elif m.role == 'tool' %}", """
  {%- elif m.role == 'tool' %}{{ raise_exception('Results are not supported by this model') }}""")
"""Tells of tools, and refuses their results."""

UNKNOWN_CALLS = HERMES.replace("tool_call>", "invocation>")
"""Tells of tools; how the model writes calls is none of the ways that are known."""

FAMILIES = {
    "hermes": HERMES, "smollm3": SMOLLM3, "qwen3_xml": QWEN3_XML, "llama3_json": LLAMA3, "mistral": MISTRAL,
    "mistral_v11": MISTRAL_V11, "granite": GRANITE,
}
