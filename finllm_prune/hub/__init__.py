"""The Hub: where base models come from, and the card of what goes there."""
