"""Several processes that train one run together, each on its own device."""
