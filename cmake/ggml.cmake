# Finds the release of llama-cpp-python to build for, with the Python that runs the build, and its ggml.
# Sets ADASKIP_VERSION (of llama-cpp-python), ADASKIP_SHA256 (of its sdist) and ggml_DIR.

find_package(Python3 COMPONENTS Interpreter QUIET)
if(NOT Python3_Interpreter_FOUND)
    adaskip_fail("no Python 3 found; install Python 3.10 or later, or pass -DPython3_EXECUTABLE=PATH.")
endif()

execute_process(COMMAND "${Python3_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/releases.py" RESULT_VARIABLE result
    OUTPUT_VARIABLE found ERROR_VARIABLE reason OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_STRIP_TRAILING_WHITESPACE)
if(NOT result EQUAL 0)
    adaskip_fail("${reason}")
endif()
list(GET found 0 ADASKIP_VERSION)
list(GET found 1 ADASKIP_SHA256)
list(GET found 2 found_ggml)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS
    "${CMAKE_CURRENT_LIST_DIR}/releases.txt" "${CMAKE_CURRENT_LIST_DIR}/releases.py")
# find_package would cache the results of its search, and pip removes that build environment. The package of 0.3.34 and
# older caches its own searches too.
get_cmake_property(cached CACHE_VARIABLES)
list(FILTER cached INCLUDE REGEX "^GGML_.*LIBRARY$")
foreach(variable IN LISTS cached)
    unset(${variable} CACHE)
endforeach()
set(ggml_DIR "${found_ggml}" CACHE PATH "ggml's CMake package" FORCE)
cmake_path(GET ggml_DIR PARENT_PATH ADASKIP_GGML_PREFIX)
cmake_path(APPEND ADASKIP_GGML_PREFIX ../.. OUTPUT_VARIABLE ADASKIP_GGML_PREFIX)
cmake_path(NORMAL_PATH ADASKIP_GGML_PREFIX)
string(REGEX REPLACE "/$" "" ADASKIP_GGML_PREFIX "${ADASKIP_GGML_PREFIX}")
