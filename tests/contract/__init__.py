"""The backend contract: one suite for the simulator and for real KVM, here and in a lab kernel."""
