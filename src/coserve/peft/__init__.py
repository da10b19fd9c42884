"""Bypass kinds, adapters as flat tensors, and PEFT's file format in and out."""
