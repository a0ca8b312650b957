"""Formats of dates where a page does not say otherwise (settings.FORMAT_MODULE_PATH)."""
