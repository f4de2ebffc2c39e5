"""What KVM's mmu does to page tables, compiled, under KVM's names."""
