"""The two processes of a server: both ends of the wire between them, and what is said over it."""
