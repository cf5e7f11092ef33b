"""What a finished run becomes elsewhere: a merged folder, GGUF, Ollama, MLX, the hub; and how true each stays to it."""
