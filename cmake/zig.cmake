# Toolchain file: zig, from the PyPI package ziglang, as compiler and linker for another platform.
# ZIG: its path. ZIG_TARGET: the platform, such as x86_64-linux-gnu.2.17 (with the oldest glibc) or aarch64-macos.11.0.

list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES ZIG ZIG_TARGET)

set(CMAKE_C_COMPILER   "${ZIG}" cc  -target "${ZIG_TARGET}")
set(CMAKE_CXX_COMPILER "${ZIG}" c++ -target "${ZIG_TARGET}")

# -g0: by default zig writes debug tables. -O3: zig compiles its C++ runtime for each optimization level, so CMake's
# trials use the level of the build.
set(CMAKE_C_FLAGS_INIT   "-g0 -O3")
set(CMAKE_CXX_FLAGS_INIT "-g0 -O3")

string(REGEX REPLACE "-.*" "" CMAKE_SYSTEM_PROCESSOR "${ZIG_TARGET}")
if(ZIG_TARGET MATCHES "-windows")
    set(CMAKE_SYSTEM_NAME Windows)
    set(CMAKE_RC_COMPILER "${ZIG}") # CMake wants a compiler for resources; there are none
    set(CMAKE_SHARED_LINKER_FLAGS_INIT "${CMAKE_CURRENT_LIST_DIR}/zig_windows.c")
elseif(ZIG_TARGET MATCHES "-macos")
    set(CMAKE_SYSTEM_NAME Darwin)
    set(CMAKE_INSTALL_NAME_TOOL "${ZIG}") # likewise; the linker already sets the installed RUNPATH
else()
    set(CMAKE_SYSTEM_NAME Linux)
endif()
