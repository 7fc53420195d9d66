"""How close training comes to what the machine can do, and how long a run will take."""
