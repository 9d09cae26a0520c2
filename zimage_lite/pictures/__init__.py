"""Files to pixels and back: pictures read, laid out for the model, put together again and saved."""
