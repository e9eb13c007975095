"""From finished runs to reports: tables, studies, plots."""
