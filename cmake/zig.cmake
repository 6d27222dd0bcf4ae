# Toolchain: zig, which the PyPI package ziglang brings, as compiler and linker for another platform.
# ZIG is its path, ZIG_TARGET what it compiles for, such as x86_64-linux-gnu.2.17 (the least glibc) or aarch64-macos.11.0.

list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES ZIG ZIG_TARGET)

set(CMAKE_C_COMPILER   "${ZIG}" cc  -target "${ZIG_TARGET}")
set(CMAKE_CXX_COMPILER "${ZIG}" c++ -target "${ZIG_TARGET}")

# zig writes the debugger's tables unless told not to, and compiles its C++ runtime anew for each way of optimizing: CMake's
# trials have ours.
set(CMAKE_C_FLAGS_INIT   "-g0 -O3")
set(CMAKE_CXX_FLAGS_INIT "-g0 -O3")

string(REGEX REPLACE "-.*" "" CMAKE_SYSTEM_PROCESSOR "${ZIG_TARGET}")
if(ZIG_TARGET MATCHES "-windows")
    set(CMAKE_SYSTEM_NAME Windows)
    set(CMAKE_RC_COMPILER "${ZIG}") # CMake asks for one; there are no resources
    set(CMAKE_SHARED_LINKER_FLAGS_INIT "${CMAKE_CURRENT_LIST_DIR}/zig_windows.c")
elseif(ZIG_TARGET MATCHES "-macos")
    set(CMAKE_SYSTEM_NAME Darwin)
    set(CMAKE_INSTALL_NAME_TOOL "${ZIG}") # likewise; the library is linked with the RUNPATH that it is installed with
else()
    set(CMAKE_SYSTEM_NAME Linux)
endif()
