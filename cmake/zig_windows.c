// Linked into each DLL. From a DLL without marked or listed functions, zig also exports atexit. Programs linked to that
// DLL would then have it twice.
__asm__(".section .drectve,\"yn\"\n.ascii \" -exclude-symbols:atexit\"\n");
