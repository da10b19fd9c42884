"""The service: an OpenAI-compatible server over an engine in a process of its own."""
