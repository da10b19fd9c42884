"""The demo: a small model learns facts and a manner of speaking it cannot know."""
