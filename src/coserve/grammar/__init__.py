"""Grammars that an output must match, as texts for `SamplingConfig.grammar`.

    from coserve.grammar import json_schema
    SamplingConfig(grammar=json_schema({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}))
"""

from coserve.grammar.build import after, choice, ebnf, json_object, json_schema, nested, regex

__all__ = ["after", "choice", "ebnf", "json_object", "json_schema", "nested", "regex"]
