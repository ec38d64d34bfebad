"""Who owns which KV page, and which prefixes are cached: page ids on the host, no tensors (those are in `pool`)."""
