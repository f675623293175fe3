"""Pieces that model families share."""
