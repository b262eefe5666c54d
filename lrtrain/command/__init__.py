"""The console command `lrtrain`."""
