"""Data as LeRobot has it: datasets read, repacked for a robot, and written."""
