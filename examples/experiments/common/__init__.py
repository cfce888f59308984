"""Shared by experiments: results, statistics, command lines, digits, networks."""
