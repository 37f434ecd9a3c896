"""``python -m fastnn`` prints what this installation is made of and runs on."""

from fastnn.info import backend_info

print(backend_info())
