"""Measurements of fastnn beside what people would use otherwise. See CONTRIBUTING.md."""
