"""Reading KV caches: how new tokens enter them, and what must hold for them to be compressed."""
