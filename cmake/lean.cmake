# Included by the project of llama-cpp-python itself, when `make` compiles it for the tests (see the Makefile): leaves out
# what no test needs, and compiles the models together. Saves a third of the time.

set(LLAMA_BUILD_COMMON OFF)
include("${CMAKE_CURRENT_LIST_DIR}/models.cmake")
cmake_language(DEFER CALL adaskip_unite_models)
