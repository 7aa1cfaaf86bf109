"""How frozen weights are stored: one file a format, one row here."""

__all__ = ["FORMATS"]

# name: module; dense weights are no row
FORMATS: dict[str, str] = {}
