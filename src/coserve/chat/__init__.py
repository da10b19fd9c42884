"""Conversations before they are tokens: what a message may hold, what the chat template makes of it, control tokens in it."""
