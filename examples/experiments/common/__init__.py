"""Shared by experiments: statistics, command lines, digits, networks, taking turns."""
