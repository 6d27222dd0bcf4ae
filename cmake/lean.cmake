# Included by the project of llama-cpp-python itself, when `make` compiles it for the tests (see the Makefile): leaves out
# llama-common, which Python does not use, and compiles the models together.

set(LLAMA_BUILD_COMMON OFF)
include("${CMAKE_CURRENT_LIST_DIR}/models.cmake")
cmake_language(DEFER CALL adaskip_unite_models)
