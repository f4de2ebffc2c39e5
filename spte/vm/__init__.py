"""The virtual machine behind KVM's dirty-log interface: order of steps, errno, requests."""
