# Puts into the wheel: one libllama, its build record, adaskip.h and llama.cpp's licence.

if(APPLE)
    set(ADASKIP_RPATH "@loader_path/../../llama_cpp/lib")
    target_link_options(llama PRIVATE -Wl,-dead_strip_dylibs -Wl,-x -Wl,-S) # -S: without the paths of object files
elseif(WIN32)
    set(ADASKIP_RPATH "") # the Python package sets the folder of ggml's libraries
    target_link_options(llama PRIVATE $<$<NOT:$<CXX_COMPILER_ID:MSVC>>:-Wl,-s>)
else()
    set(ADASKIP_RPATH "$ORIGIN/../../llama_cpp/lib")
    # --as-needed: ggml's package links to the backends of the build's llama-cpp-python (CPU, CUDA ...). libllama calls
    # none of them, and must not need a backend that a user's environment lacks.
    # A Debug build keeps its symbols, for the reports of the sanitizers.
    target_link_options(llama PRIVATE -Wl,--as-needed $<$<NOT:$<CONFIG:Debug>>:-Wl,-s>)
endif()
set_target_properties(llama PROPERTIES
    BUILD_WITH_INSTALL_RPATH   ON
    INSTALL_RPATH              "${ADASKIP_RPATH}"
    INSTALL_RPATH_USE_LINK_PATH OFF
    INSTALL_REMOVE_ENVIRONMENT_RPATH ON)

get_directory_property(ADASKIP_LLAMA_VERSION DIRECTORY "${ADASKIP_LLAMA}" DEFINITION LLAMA_VERSION)
file(STRINGS "${ggml_DIR}/ggml-config.cmake" ADASKIP_GGML_VERSION REGEX "set\\(GGML_VERSION ")
string(REGEX REPLACE ".*\"(.*)\".*" "\\1" ADASKIP_GGML_VERSION "${ADASKIP_GGML_VERSION}")
configure_file("${CMAKE_CURRENT_LIST_DIR}/build.json.in" build.json @ONLY)

# A wheel cannot contain symbolic links, and llama_cpp opens libllama.so, so only that name is installed. Its SONAME is
# still libllama.so.0, which libmtmd needs.
install(PROGRAMS "$<TARGET_FILE:llama>" DESTINATION adaskip_cpp/lib
    RENAME "${CMAKE_SHARED_LIBRARY_PREFIX}llama${CMAKE_SHARED_LIBRARY_SUFFIX}")
install(FILES "${CMAKE_CURRENT_BINARY_DIR}/build.json" DESTINATION adaskip_cpp/lib)
install(FILES "${ADASKIP_LLAMA}/LICENSE" DESTINATION adaskip_cpp/lib RENAME LICENSE.llama.cpp)
install(FILES native/adaskip.h DESTINATION adaskip_cpp/include OPTIONAL)
