# The target llama: llama.cpp's sources with patches/ and native/.

set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS
    "${CMAKE_CURRENT_LIST_DIR}/llama_sources.py" "${ADASKIP_PATCHES}/series")
file(GLOB ADASKIP_PATCH_FILES CONFIGURE_DEPENDS "${ADASKIP_PATCHES}/*.patch")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${ADASKIP_PATCH_FILES})

set(sources_command "${Python3_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/llama_sources.py"
    --release "${ADASKIP_VERSION}" --patches "${ADASKIP_PATCHES}" --work "${CMAKE_CURRENT_BINARY_DIR}")
if(ADASKIP_SDIST)
    list(APPEND sources_command --sdist "${ADASKIP_SDIST}")
endif()
execute_process(COMMAND ${sources_command} RESULT_VARIABLE result
    OUTPUT_VARIABLE ADASKIP_LLAMA ERROR_VARIABLE reason OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_STRIP_TRAILING_WHITESPACE)
if(NOT result EQUAL 0)
    adaskip_fail("${reason}")
endif()

set(BUILD_SHARED_LIBS        ON)
set(LLAMA_USE_SYSTEM_GGML    ON)
if(CMAKE_CROSSCOMPILING)
    # The installed ggml is for this platform. The other one is compiled without backends, only to link to.
    set(LLAMA_USE_SYSTEM_GGML OFF)
    foreach(option IN ITEMS BLAS CCACHE CPU METAL OPENMP)
        set(GGML_${option} OFF)
    endforeach()
endif()
if(WIN32)
    set(CMAKE_SHARED_LIBRARY_PREFIX "") # llama-cpp-python's mtmd.dll needs llama.dll
endif()
set(LLAMA_BUILD_COMMON       OFF)
set(LLAMA_BUILD_IS_DEV       OFF)
set(LLAMA_BUILD_NUMBER       0)
set(LLAMA_BUILD_COMMIT       "llama-cpp-python-${ADASKIP_VERSION}") # else git would find our own commit
set(CMAKE_CXX_STANDARD       17)
set(CMAKE_POLICY_DEFAULT_CMP0077 NEW) # option() of llama.cpp keeps the variables set here
set(CMAKE_SKIP_INSTALL_RULES OFF)

# llama.cpp's assertions contain __FILE__: this replaces the paths of the build by names.
foreach(map IN ITEMS "${CMAKE_CURRENT_SOURCE_DIR}=adaskip-cpp" "${ADASKIP_GGML_PREFIX}=ggml"
                     "${CMAKE_CURRENT_BINARY_DIR}=build" "${ADASKIP_LLAMA}=llama.cpp")
    if(NOT MSVC)
        add_compile_options("-ffile-prefix-map=${map}")
    endif()
endforeach()

# EXCLUDE_FROM_ALL also excludes llama.cpp's own install rules.
add_subdirectory("${ADASKIP_LLAMA}" llama EXCLUDE_FROM_ALL)
include("${CMAKE_CURRENT_LIST_DIR}/models.cmake")
adaskip_unite_models()
if(CMAKE_CROSSCOMPILING)
    target_compile_options(ggml-base PRIVATE -O1) # it is never run
endif()
if(ZIG AND CMAKE_SYSTEM_NAME STREQUAL "Linux")
    # zig would link its own unwinder. Exceptions for ggml's aborts pass through C++ frames of ggml, which use gcc's
    # unwinder. With two unwinders, such an exception ends the process. So libllama must use gcc's too. This stand-in for
    # libgcc_s.so.1 has only its name and symbols.
    set(unwinder "")
    foreach(name IN ITEMS Backtrace DeleteException GetCFA GetDataRelBase GetGR GetIP GetIPInfo GetLanguageSpecificData
            GetRegionStart GetTextRelBase RaiseException Resume Resume_or_Rethrow SetGR SetIP)
        string(APPEND unwinder "void _Unwind_${name}(void) {}\n")
    endforeach()
    file(CONFIGURE OUTPUT unwinder.c CONTENT "${unwinder}" @ONLY)
    add_library(gcc_s SHARED EXCLUDE_FROM_ALL "${CMAKE_CURRENT_BINARY_DIR}/unwinder.c")
    set_target_properties(gcc_s PROPERTIES SOVERSION 1)
    target_link_libraries(llama PRIVATE gcc_s)
endif()

file(GLOB ADASKIP_NATIVE CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/native/*.cpp")
# The third number of llama-cpp-python's version, such as 36, for differences between releases of llama.cpp.
string(REGEX REPLACE "^[0-9]+\\.[0-9]+\\.([0-9]+).*" "\\1" ADASKIP_RELEASE "${ADASKIP_VERSION}")
target_compile_definitions(llama PRIVATE "ADASKIP_RELEASE=${ADASKIP_RELEASE}")
target_include_directories(llama PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/native" "${ADASKIP_LLAMA}/src")
if(ADASKIP_NATIVE)
    target_sources(llama PRIVATE ${ADASKIP_NATIVE})
    set_source_files_properties(${ADASKIP_NATIVE} TARGET_DIRECTORY llama PROPERTIES
        SKIP_UNITY_BUILD_INCLUSION ON
        COMPILE_OPTIONS "$<IF:$<CXX_COMPILER_ID:MSVC>,/W4,-Wall;-Wextra>")
endif()

# A DLL exports marked or listed functions. llama.h has marks for MSVC alone. adaskip.h has none, because cffi reads it.
# llama-cpp-python's mtmd.dll, compiled by MSVC, calls one C++ function under MSVC's name.
if(WIN32)
    set(exports EXPORTS)
    file(READ "${ADASKIP_LLAMA}/include/llama.h" header)
    file(READ "${CMAKE_CURRENT_SOURCE_DIR}/native/adaskip.h" ours)
    string(REGEX REPLACE "//[^\n]*" "" header "${header}")
    string(REGEX MATCHALL "LLAMA_API( DEPRECATED\\()?[a-z0-9_ \n*]*[ (]\\**llama_[a-z0-9_]+ *\\(" declarations "${header}")
    string(REGEX MATCHALL "\n[a-z][a-z0-9_ *]* adaskip_[a-z_]+\\(" ours "${ours}")
    foreach(declaration IN LISTS declarations ours)
        string(REGEX MATCH "[a-z0-9_]+ *\\($" name "${declaration}")
        string(REGEX REPLACE " *\\($" "" name "${name}")
        list(APPEND exports "${name}")
    endforeach()
    file(STRINGS "${ADASKIP_LLAMA}/src/llama-ext.h" get_tok_embd REGEX "llama_model_get_tok_embd")
    if(get_tok_embd AND NOT MSVC)
        list(APPEND exports "\"?llama_model_get_tok_embd@@YAIPEBUllama_model@@PEAM@Z\" = _Z24llama_model_get_tok_embdPK11llama_modelPf")
    endif()
    list(JOIN exports "\n" exports)
    file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/llama.def" "${exports}\n") # CONFIGURE would replace MSVC's @...@
    target_sources(llama PRIVATE "${CMAKE_CURRENT_BINARY_DIR}/llama.def")
endif()
