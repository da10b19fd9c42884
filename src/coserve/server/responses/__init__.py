"""OpenAI's Responses API over chats: a body becomes a ChatRequest, an output becomes items and events."""
