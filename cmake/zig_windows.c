// Linked into each DLL. zig exports atexit too from one that marks and lists nothing, and what is linked to that DLL then
// has it twice.
__asm__(".section .drectve,\"yn\"\n.ascii \" -exclude-symbols:atexit\"\n");
