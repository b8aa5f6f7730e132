"""Architectures as plain single-device PyTorch, and their names and files in Hugging Face's format."""
