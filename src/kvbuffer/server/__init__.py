"""The HTTP API: OpenAI's endpoints over an :class:`kvbuffer.engine.async_engine.AsyncEngine`."""
