"""A real server under a random load of all kinds of requests, with everything else that happens to servers."""
