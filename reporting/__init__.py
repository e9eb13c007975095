"""Turns runs into reports: tables, studies and plots."""
