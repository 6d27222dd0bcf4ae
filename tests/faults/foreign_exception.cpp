// Throws what another C++ runtime than libllama's would: it can be caught there, but not looked at.

#include <unwind.h>

#include <cstdlib>

// of a class that no runtime has
static _Unwind_Exception foreign = {};

// an adaskip_statistics_callback
extern "C" void throw_foreign(const void *, void *) {
    _Unwind_RaiseException(&foreign);
    abort(); // nobody catches it
}
