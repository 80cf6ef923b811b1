"""Whole applications, built only on the tiers below."""
