"""How a model runs packed rows: attention in which answers share their prompt, and rows for what isn't attention."""
