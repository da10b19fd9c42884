"""JSON bodies of all routes: read, parsed, validated, and explained where they are wrong."""
