"""The benchmark behind `python -m dpsgd.bench`: systems -> measurements -> table, JSON, chart."""
