# Enables C and C++, or stops with one line if there is no compiler.

include(CheckLanguage)
foreach(language IN ITEMS C CXX)
    check_language(${language})
    if(NOT CMAKE_${language}_COMPILER)
        adaskip_fail("no working ${language} compiler found; install one (Debian: apt install g++, macOS: xcode-select --install) or name it in the environment variables CC and CXX.")
    endif()
    enable_language(${language})
endforeach()

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
    set(CMAKE_BUILD_TYPE Release CACHE STRING "build type" FORCE)
endif()
