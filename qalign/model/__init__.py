"""One quantised base and the adapters that make it play every role."""
