"""Replicas of a server behind a router that knows prefixes."""
