"""How answers are decoded: adapters as sampling holds them, caches that grow or stay, CUDA graphs, vLLM."""
