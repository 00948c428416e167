"""Clips, controls and text as training samples."""
