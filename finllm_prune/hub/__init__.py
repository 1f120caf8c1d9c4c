"""The Hub: where base models come from, what goes there and how, and its card."""
