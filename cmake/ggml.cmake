# Finds ggml where the Python that runs the build has llama-cpp-python, which must be the pinned version.
# Sets ADASKIP_VERSION (of llama-cpp-python) and ggml_DIR.

find_package(Python3 COMPONENTS Interpreter QUIET)
if(NOT Python3_Interpreter_FOUND)
    adaskip_fail("no Python 3 found; install Python 3.10 or later, or pass -DPython3_EXECUTABLE=PATH.")
endif()

file(STRINGS "${ADASKIP_REQUIREMENT}" ADASKIP_PIN REGEX "^llama-cpp-python==")
string(REGEX MATCH "==([^ ]+) --hash=sha256:([0-9a-f]+)" ADASKIP_PIN "${ADASKIP_PIN}")
set(ADASKIP_VERSION "${CMAKE_MATCH_1}")
set(ADASKIP_SHA256 "${CMAKE_MATCH_2}")

execute_process(
    COMMAND "${Python3_EXECUTABLE}" -c
        "import importlib.metadata as m; d = m.distribution('llama-cpp-python'); print(d.version, d.locate_file('lib/cmake/ggml').as_posix(), sep=';', end='')"
    OUTPUT_VARIABLE found ERROR_QUIET RESULT_VARIABLE result)
if(NOT result EQUAL 0)
    adaskip_fail("${Python3_EXECUTABLE} has no llama-cpp-python, whose ggml libllama is linked to; pip install llama-cpp-python==${ADASKIP_VERSION}.")
endif()
list(GET found 0 found_version)
list(GET found 1 found_ggml)
string(REGEX REPLACE "\\+.*" "" found_version "${found_version}") # a local part names the backend, such as +cu124
if(NOT found_version STREQUAL ADASKIP_VERSION)
    adaskip_fail("llama-cpp-python ${found_version} is installed but ${ADASKIP_VERSION} is needed; pip install llama-cpp-python==${ADASKIP_VERSION}.")
endif()
if(NOT EXISTS "${found_ggml}/ggml-config.cmake")
    adaskip_fail("llama-cpp-python ${found_version} has no CMake package of ggml in ${found_ggml}; pip install --force-reinstall --no-binary llama-cpp-python llama-cpp-python==${ADASKIP_VERSION}.")
endif()
# Not left to find_package's own search, whose cached result would outlive the build environment it was found in.
set(ggml_DIR "${found_ggml}" CACHE PATH "ggml's CMake package" FORCE)
cmake_path(GET ggml_DIR PARENT_PATH ADASKIP_GGML_PREFIX)
cmake_path(APPEND ADASKIP_GGML_PREFIX ../.. OUTPUT_VARIABLE ADASKIP_GGML_PREFIX)
cmake_path(NORMAL_PATH ADASKIP_GGML_PREFIX)
string(REGEX REPLACE "/$" "" ADASKIP_GGML_PREFIX "${ADASKIP_GGML_PREFIX}")
